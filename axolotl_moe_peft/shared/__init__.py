"""What the methods share and what knows neither a method nor Axolotl."""
