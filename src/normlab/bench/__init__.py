"""Trains one network with many normalizers under equal conditions, and compares them."""
