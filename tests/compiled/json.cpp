#define MOE_TEST_INSTANTIATE
#include "json.hpp"
