#include <cstdio>

#include "host/engine.h"

int main() { std::printf("%lld positions\n", static_cast<long long>(vivace::EngineOptions{}.capacity)); }
