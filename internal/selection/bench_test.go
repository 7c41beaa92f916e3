// This file measures what a choice costs.

package selection

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func BenchmarkChoose(b *testing.B) {
	for _, name := range []string{"least_conn", "random_choose", "round_robin", "cookie"} {
		for _, n := range []int{3, 100} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				ctx, cancel := caddy.NewContext(caddy.Context{Context: b.Context()})
				defer cancel()
				policy, err := Load(ctx, json.RawMessage(every[name]))
				if err != nil {
					b.Fatal(err)
				}
				candidates := make([]Candidate, n)
				for i := range candidates {
					candidates[i] = Candidate{Upstream: NewUpstream(fmt.Sprintf("10.0.0.%d:80", i)), Available: i%10 != 9}
				}
				r := request("/")
				b.ReportAllocs()
				for b.Loop() {
					i, _ := policy.Choose(candidates, r)
					candidates[i].Conns++
				}
			})
		}
	}
}
