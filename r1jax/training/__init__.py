"""State, step and the only training loop; which loss and which data, the tasks above decide."""
