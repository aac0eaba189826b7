"""The main job: real packed documents through forward and backward, every result checked, time and memory compared."""
