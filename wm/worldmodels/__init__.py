"""World Models (Ha & Schmidhuber 2018): V sees, M dreams, C acts."""
