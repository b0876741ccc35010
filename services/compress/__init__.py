"""The compression stage as the services run it: segments in and out of the store."""
