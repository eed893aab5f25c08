// backward_test.cpp, compiled for a device.

#include "backward_test.cpp"
