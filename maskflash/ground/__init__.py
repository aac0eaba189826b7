"""What every layer may use: callers' values checked, tensors told apart, devices and modes left."""
