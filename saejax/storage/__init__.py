"""Files of a run: checkpoints, records, logs, locks, atomic writes."""
