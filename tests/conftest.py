"""One thread for the matrix library: on arrays this small, several threads only wait for each other."""

from threadpoolctl import threadpool_limits

threadpool_limits(1)
