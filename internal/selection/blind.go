// This file has what is left if policies cannot be shown any state.

package selection

import (
	"math/rand/v2"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// available returns the available ones of the candidates' upstreams.
func available(candidates []Candidate) reverseproxy.UpstreamPool {
	pool := make(reverseproxy.UpstreamPool, 0, len(candidates))
	for _, c := range candidates {
		if c.Available {
			pool = append(pool, c.theirs)
		}
	}
	return pool
}

// fewest returns the index of the available candidate that has the fewest
// connections in a random sample of that size, at random among equals, or -1.
func fewest(candidates []Candidate, sample int) int {
	best := -1
	for _, i := range rand.Perm(len(candidates)) {
		if !candidates[i].Available {
			continue
		}
		if best < 0 || candidates[i].Conns < candidates[best].Conns {
			best = i
		}
		if sample--; sample == 0 {
			break
		}
	}
	return best
}
