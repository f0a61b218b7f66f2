"""Updates made of tensors that all places share."""
