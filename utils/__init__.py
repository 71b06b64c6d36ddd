"""What the scripts share: files, command line, CLIP, seeds, checkpoints, metrics, reports."""
