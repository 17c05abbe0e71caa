"""What a guest is made of, kept between runs: kernels, their modules, initial file systems."""
