"""What every op runs on: the choice of a backend, checks of arguments, packed rows and their segments."""
