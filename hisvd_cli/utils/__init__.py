"""What everything else rests on: errors, progress, devices, several processes."""
