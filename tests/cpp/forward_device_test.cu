// forward_test.cpp, compiled for a device.

#include "forward_test.cpp"
