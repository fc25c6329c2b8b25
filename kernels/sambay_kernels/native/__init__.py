"""C++ and CUDA C++: their sources, building them on first use, and calling them."""
