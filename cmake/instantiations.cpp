#define MOE_INSTANTIATE
#include <moe/instantiations.hpp>
