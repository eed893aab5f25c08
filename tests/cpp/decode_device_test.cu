// decode_test.cpp, compiled for a device.

#include "decode_test.cpp"
