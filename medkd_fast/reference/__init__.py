"""The definitions: plain PyTorch in any dtype, without tricks. The oracle of the tests and the fallback."""
