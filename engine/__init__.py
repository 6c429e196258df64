"""The parts that train.py's loop is assembled from. Nothing here imports the project's scripts."""
