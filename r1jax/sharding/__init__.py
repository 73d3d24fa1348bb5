"""Devices as a mesh, and the tables that say what is split over which of its axes; knows nothing of training."""
