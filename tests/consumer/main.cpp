#include <moe/moe.hpp>

int main() { return MOE_VERSION_MAJOR == 0 ? 0 : 1; }
