"""The sequential test of the certificate while a version serves."""
