#define MOE_TEST_INSTANTIATE
#include "products.hpp"
