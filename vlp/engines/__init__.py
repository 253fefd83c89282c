"""What keeps ranks in step: one process, DDP, FSDP2, DeepSpeed's ZeRO."""
