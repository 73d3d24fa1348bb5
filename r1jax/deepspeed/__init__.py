"""DeepSpeed's ZeRO checkpoints, read and written with numpy alone: neither torch nor deepspeed is imported."""
