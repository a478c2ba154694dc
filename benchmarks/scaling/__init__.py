"""A model of the time of an update on many GPUs; fitted to the recorded runs of one."""
