#define MOE_INSTANTIATE double
#include <moe/instantiations.hpp>
