"""DeepSpeed's ZeRO checkpoints, read and written with numpy: neither torch nor deepspeed is needed."""
