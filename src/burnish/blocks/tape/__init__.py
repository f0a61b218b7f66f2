"""What backward keeps, makes again, or finds elsewhere."""
