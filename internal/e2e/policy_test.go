// This file shows of every selection policy, over 1000 connections, that it does what
// its name says: the policies that spread connections, and those that count them.

package e2e

import (
	"slices"
	"testing"
)

// crowdSize is how many connections show what a policy does.
const crowdSize = 1000

// level reports whether no count is more than by above another.
func level(counts []int, by int) bool { return slices.Max(counts)-slices.Min(counts) <= by }

// What each policy makes of connections that stay, by upstream.
func TestPolicySpread(t *testing.T) {
	posts := startPosts(t, 3)
	tests := []struct {
		name, policy string
		least, most  []int
	}{
		// Seven standard deviations.
		{"random", "random", []int{230, 230, 230}, []int{440, 440, 440}},
		{"random_choose", "random_choose 2", []int{320, 320, 320}, []int{347, 347, 347}},
		{"least_conn", "least_conn", []int{333, 333, 333}, []int{334, 334, 334}},
		{"round_robin", "round_robin", []int{333, 333, 333}, []int{334, 334, 334}},
		{"weighted_round_robin", "weighted_round_robin 3 1 1", []int{600, 200, 200}, []int{600, 200, 200}},
		{"zero_weight", "weighted_round_robin 1 0 3", []int{250, 0, 750}, []int{250, 0, 750}},
		{"first", "first", []int{crowdSize, 0, 0}, []int{crowdSize, 0, 0}},
	}
	policies := make(map[string]string)
	for _, test := range tests {
		policies[test.name] = test.policy
	}
	p := startCaddy(t, "", policySites(posts, policies))
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			all := p.visit(t, crowdSize, func(int) visitor { return visitor{target: "/" + test.name} })
			got := all.by(posts)
			for i, n := range got {
				if n < test.least[i] || n > test.most[i] {
					t.Errorf("connections by upstream: got %v, want %v to %v", got, test.least, test.most)
					break
				}
			}
			if shown := p.loads(t, test.name); !slices.Equal(shown, got) {
				t.Errorf("connections by upstream: the API shows %v, the backends said %v", shown, got)
			}
		})
	}
}

// With least_conn a fixed set of upstreams is level at every moment, also when what
// one lost was taken over by the others. One that comes back gets all new connections
// until it is level.
func TestPolicyLeastConnIsLevel(t *testing.T) {
	posts := startPosts(t, 3)
	const route = "least_conn"
	p := startCaddy(t, "", policySites(posts, map[string]string{route: ""}))
	plain := func(int) visitor { return visitor{target: "/" + route} }

	all := visitorsOf(crowdSize, plain)
	t.Cleanup(all.leave)
	dialed := make(chan error, 1)
	go func() { dialed <- all.connect(p.addr) }()
	opening, looked, uneven := true, 0, 0
	for ; opening; looked++ {
		select {
		case err := <-dialed:
			if opening = false; err != nil {
				t.Fatal(err)
			}
		default:
		}
		if counts := p.loads(t, route); !level(counts, 1) {
			uneven++
		}
	}
	if uneven > 0 {
		t.Errorf("connections by upstream: not level at %d of %d looks", uneven, looked)
	}
	p.waitLoads(t, route, "all there are", func(c []int) bool { return sum(c) == crowdSize })

	posts[1].leave()
	p.waitLoads(t, route, "those of the lost one on the others, level", func(c []int) bool {
		return sum(c) == crowdSize && c[1] == 0 && level([]int{c[0], c[2]}, 1)
	})
	posts[1].come(t)
	if got := p.visit(t, 450, plain).by(posts); got[1] != 450 {
		t.Errorf("new connections by upstream: got %v, want all on the one that came back", got)
	}
	if got := p.visit(t, 50+150, plain).by(posts); !level([]int{got[0], got[1] - 50, got[2]}, 2) {
		t.Errorf("new connections by upstream: got %v, want 50 on the one that came back until it is level, then a third each", got)
	}
	if got := p.loads(t, route); !level(got, 1) {
		t.Errorf("connections by upstream: got %v, want them level", got)
	}
}

// random_choose compares how many connections upstreams have: one that comes back is
// among the two in two of three cases, and then it is chosen.
func TestPolicyRandomChooseCounts(t *testing.T) {
	posts := startPosts(t, 3)
	const route = "random_choose"
	p := startCaddy(t, "", policySites(posts, map[string]string{route: "random_choose 2"}))
	plain := func(int) visitor { return visitor{target: "/" + route} }
	p.visit(t, crowdSize, plain)
	posts[1].leave()
	p.waitLoads(t, route, "none on the second", func(c []int) bool { return sum(c) == crowdSize && c[1] == 0 })
	posts[1].come(t)
	if got := p.visit(t, 300, plain).by(posts); got[1] < 140 || got[1] > 260 {
		t.Errorf("new connections by upstream: got %v, want about 200 on the one that came back", got)
	}
}

// What serves as a fallback counts connections, too: those that came by a key, and
// its own.
func TestPolicyFallbacksCount(t *testing.T) {
	posts := startPosts(t, 3)
	policies := map[string]string{
		"query":  "query key {\n fallback least_conn\n }",
		"header": "header X-Key {\n fallback least_conn\n }",
		"cookie": "cookie lb secret {\n fallback least_conn\n }",
	}
	p := startCaddy(t, "", policySites(posts, policies))
	for name := range policies {
		t.Run(name, func(t *testing.T) {
			plain := func(int) visitor { return visitor{target: "/" + name} }
			first := p.visit(t, 1, plain)[0]
			keyed := p.visit(t, 300, func(int) visitor {
				v := visitor{target: "/" + name + "?key=one", header: "X-Key: one\r\n"}
				for _, c := range first.cookies {
					v.header += "Cookie: " + c.Name + "=" + c.Value + "\r\n"
				}
				return v
			}).by(posts)
			if slices.Max(keyed) != 300 {
				t.Fatalf("connections of one key by upstream: got %v, want all on one", keyed)
			}
			got := p.visit(t, 598, plain).by(posts)
			for i, n := range got {
				if keyed[i] == 300 && n != 0 {
					t.Errorf("connections without a key by upstream: got %v, want none where %v are", got, keyed)
				}
			}
			p.visit(t, 101, plain)
			if got := p.loads(t, name); !level(got, 1) || sum(got) != crowdSize {
				t.Errorf("connections by upstream: got %v, want them level", got)
			}
		})
	}
}

// first takes the first of those that are there, also for connections that have lost
// theirs. Who has gone over stays; new ones go to the first again.
func TestPolicyFirst(t *testing.T) {
	posts := startPosts(t, 3)
	p := startCaddy(t, "", policySites(posts, map[string]string{"first": "first"}))
	plain := func(int) visitor { return visitor{target: "/first"} }
	want := func(what string, all visitors, want ...int) {
		t.Helper()
		if got := all.by(posts); !slices.Equal(got, want) {
			t.Errorf("%s: connections by upstream: got %v, want %v", what, got, want)
		}
	}
	all := p.visit(t, crowdSize, plain)
	want("all are there", all, crowdSize, 0, 0)
	posts[0].leave()
	all.ask(t)
	want("without the first", all, 0, crowdSize, 0)
	want("new ones without the first", p.visit(t, 50, plain), 0, 50, 0)
	posts[1].leave()
	all.ask(t)
	want("without both", all, 0, 0, crowdSize)
	posts[0].come(t)
	all.ask(t)
	want("the first is back", all, 0, 0, crowdSize)
	want("new ones when the first is back", p.visit(t, 50, plain), 50, 0, 0)
}
