"""What the train.py scripts share: command line, data, devices, loop, checkpoints, run folder."""
