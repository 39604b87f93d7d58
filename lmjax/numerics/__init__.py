"""Looking at numbers: pictures of formats, and what tensors do in them."""
