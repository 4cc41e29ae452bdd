"""What has grown beside the three modules of the service, one noun a module."""
