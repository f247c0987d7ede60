"""What has been measured against the paper."""
