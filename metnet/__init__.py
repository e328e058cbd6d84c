"""The engine: probabilistic rain nowcasting in pure PyTorch."""
