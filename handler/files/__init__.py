"""What paths are made of that others could tamper with: private files, and names from elsewhere."""
