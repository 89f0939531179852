"""Published weights in and out: key maps between Kinema's names and others'. Empty until the first preset."""
