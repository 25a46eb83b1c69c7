#pragma once

#include <moe/moe.hpp>

namespace thing {

using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;

Layer make_layer();

}  // namespace thing
