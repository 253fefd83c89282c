"""What an evaluation or a run showed: records for machines, pages for people."""
