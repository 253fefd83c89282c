"""The dual encoder, what only an objective reads of it, and several of them as one."""
