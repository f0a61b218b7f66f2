"""What is added to the states that flow between modules."""
