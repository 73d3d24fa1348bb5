"""What runs inside a vLLM server: it takes weights from a trainer and lets nobody in without the key.

Stock vLLM imports it by name (`launch/vllm_server.sh`). It knows neither JAX nor the rest of r1jax.
"""
