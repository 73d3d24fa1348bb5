"""What a completion is worth: rewards by name, and the killable processes that compute them.

No module here imports jax: the processes start in the time that sympy takes to import.
"""
