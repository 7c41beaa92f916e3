// This file tests each of Caddy's policies over 1000 connections.

package selection

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
)

// The policies that spread by chance or by count.
func TestSpread(t *testing.T) {
	for name, c := range map[string]struct {
		raw  string
		upTo int // the difference between the most and the fewest connections
	}{
		"random":                     {`{"policy":"random"}`, 150}, // six times its standard deviation
		"random_choose":              {`{"policy":"random_choose"}`, 30},
		"random_choose 2":            {`{"policy":"random_choose","choose":2}`, 30},
		"random_choose more than is": {`{"policy":"random_choose","choose":9}`, 1},
		"least_conn":                 {`{"policy":"least_conn"}`, 1},
		"unset is least_conn":        {``, 1},
		"round_robin":                {`{"policy":"round_robin"}`, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.raw, 3)
			if got := spread(r.connections(1000)); got > c.upTo {
				t.Errorf("got counts %v, want them within %d", r.counts(), c.upTo)
			}
		})
	}
}

// With connections that come and go, those of the upstream that has the fewest
// are never more than one below the others' when one is added.
func TestLeastConnFollowsTheCounts(t *testing.T) {
	for name, rigOf := range rigs {
		t.Run(name, func(t *testing.T) {
			r := rigOf(t, `{"policy":"least_conn"}`, 3)
			for n := range 1000 {
				before := r.counts()
				i, _ := r.connect(request("/"))
				if before[i] != slices.Min(before) {
					t.Fatalf("got upstream %d with counts %v, want the fewest", i, before)
				}
				if gone := &r.candidates[n*7%3]; n%3 == 0 && gone.Conns > 0 {
					gone.Conns--
				}
			}
		})
	}
}

func TestLeastConnFillsAnUpstreamThatIsBack(t *testing.T) {
	for name, rigOf := range rigs {
		t.Run(name, func(t *testing.T) {
			r := rigOf(t, `{"policy":"least_conn"}`, 3)
			r.candidates[2].Available = false
			r.connections(400)
			r.want(200, 200, 0)
			r.candidates[2].Available = true
			r.connections(200)
			r.want(200, 200, 200)
			if got := spread(r.connections(400)); got > 1 {
				t.Errorf("got counts %v, want them within 1", r.counts())
			}
		})
	}
}

// rigs are the two ways to show a policy its candidates.
var rigs = map[string]func(t *testing.T, raw string, n int) *rig{"with state": newRig, "blind": newBlindRig}

func TestRandomChooseTakesTheBetterOfItsSample(t *testing.T) {
	for name, rigOf := range rigs {
		t.Run(name, func(t *testing.T) {
			r := rigOf(t, `{"policy":"random_choose","choose":2}`, 3)
			r.candidates[1].Conns = 10_000 // no sample of two has only this one
			r.connections(1000)
			if r.candidates[1].Conns != 10_000 || spread([]int{r.candidates[0].Conns, r.candidates[2].Conns}) > 40 {
				t.Errorf("got counts %v, want 10000 in the middle and 1000 at the others", r.counts())
			}
		})
	}
}

func TestRoundRobin(t *testing.T) {
	r := newRig(t, `{"policy":"round_robin"}`, 3)
	last, _ := r.connect(request("/"))
	for range 999 {
		i, _ := r.connect(request("/"))
		if i != (last+1)%3 {
			t.Fatalf("got upstream %d after %d, want the next", i, last)
		}
		last = i
	}
}

func TestWeightedRoundRobin(t *testing.T) {
	for name, c := range map[string]struct {
		weights     string
		unavailable []int
		want        []int
	}{
		"all available": {"[6,1,3]", nil, []int{600, 100, 300}},
		// As in Caddy: the turns of the last one go to the first.
		"one is not":             {"[6,1,3]", []int{1}, []int{900, 0, 100}},
		"zero gets none":         {"[1,0,1]", nil, []int{500, 0, 500}},
		"weights stay in place":  {"[3,0,1]", []int{0}, []int{0, 0, 1000}},
		"fewer weights than are": {"[1,3]", nil, []int{250, 750, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, `{"policy":"weighted_round_robin","weights":`+c.weights+`}`, 3)
			for _, i := range c.unavailable {
				r.candidates[i].Available = false
			}
			r.connections(1000)
			r.want(c.want...)
		})
	}
}

func TestFirst(t *testing.T) {
	r := newRig(t, `{"policy":"first"}`, 3)
	r.connections(400)
	r.candidates[0].Available = false
	r.connections(300)
	r.candidates[1].Available = false
	r.connections(200)
	r.candidates[0].Available = true
	r.connections(100)
	r.want(500, 300, 200)
}

// Policies that hash: who is alike goes to the same upstream, all are used, and
// only those go elsewhere whose upstream is not available.
func TestHashing(t *testing.T) {
	for name, c := range map[string]struct {
		raw  string
		of   func(n int) *http.Request
		mask int // numbers that differ in these bits only are alike
	}{
		"ip_hash": {`{"policy":"ip_hash"}`, func(n int) *http.Request {
			r := request("/")
			r.RemoteAddr = fmt.Sprintf("10.0.%d.%d:%d", n>>8, n&^1&0xff, 1000+n)
			return r
		}, 1},
		"client_ip_hash": {`{"policy":"client_ip_hash"}`, func(n int) *http.Request {
			r := request("/")
			return Prepare(r, fmt.Sprintf("2001:db8::%x", n&^1), n&1 == 1)
		}, 1},
		"uri_hash": {`{"policy":"uri_hash"}`, func(n int) *http.Request {
			return request(fmt.Sprintf("/rooms/%d?full", n))
		}, 0},
		"query": {`{"policy":"query","key":"room"}`, func(n int) *http.Request {
			return request(fmt.Sprintf("/%d?a=%d&room=%d", n, n, n&^1))
		}, 1},
		"header": {`{"policy":"header","field":"X-Room"}`, func(n int) *http.Request {
			r := request("/")
			r.Header.Set("X-Room", fmt.Sprint(n&^1))
			return r
		}, 1},
		"header Host": {`{"policy":"header","field":"Host"}`, func(n int) *http.Request {
			r := request("/")
			r.Host = fmt.Sprintf("%d.example.com", n&^1)
			return r
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.raw, 3)
			home := make([]int, 1000)
			for n := range home {
				home[n], _ = r.connect(c.of(n))
			}
			if slices.Min(r.counts()) < 200 {
				t.Errorf("got counts %v, want all used alike", r.counts())
			}
			r.candidates[1].Available = false
			for n, was := range home {
				if home[n] != home[n&^c.mask] {
					t.Fatalf("got upstreams %d and %d, want one", home[n], home[n&^c.mask])
				}
				if i, _ := r.connect(c.of(n)); was != 1 && i != was {
					t.Fatalf("got upstream %d, want %d as when the other was available", i, was)
				}
			}
		})
	}
}

// The fallback is a policy of its own, and counts.
func TestFallbacksCount(t *testing.T) {
	for name, raw := range map[string]string{
		"query":  `{"policy":"query","key":"room","fallback":{"policy":"least_conn"}}`,
		"header": `{"policy":"header","field":"X-Room","fallback":{"policy":"least_conn"}}`,
		"cookie": `{"policy":"cookie","fallback":{"policy":"least_conn"}}`,
		"nested": `{"policy":"cookie","fallback":{"policy":"query","key":"room","fallback":{"policy":"least_conn"}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, raw, 3)
			if got := spread(r.connections(1000)); got != 1 {
				t.Errorf("got counts %v, want them within 1", r.counts())
			}
			r.candidates[0].Conns = 0
			r.connections(300)
			if r.candidates[0].Conns != 300 {
				t.Errorf("got counts %v, want all of the last 300 at the first", r.counts())
			}
		})
	}
}

// every has all of Caddy's policies, for four upstreams.
var every = map[string]string{
	"random":               `{"policy":"random"}`,
	"random_choose":        `{"policy":"random_choose","choose":2}`,
	"least_conn":           `{"policy":"least_conn"}`,
	"round_robin":          `{"policy":"round_robin"}`,
	"weighted_round_robin": `{"policy":"weighted_round_robin","weights":[1,2,3,4]}`,
	"first":                `{"policy":"first"}`,
	"ip_hash":              `{"policy":"ip_hash"}`,
	"client_ip_hash":       `{"policy":"client_ip_hash"}`,
	"uri_hash":             `{"policy":"uri_hash"}`,
	"query":                `{"policy":"query","key":"room"}`,
	"header":               `{"policy":"header","field":"X-Room"}`,
	"cookie":               `{"policy":"cookie"}`,
}

func TestUnavailableIsNeverChosen(t *testing.T) {
	for way, rigOf := range rigs {
		for name, raw := range every {
			t.Run(way+"/"+name, func(t *testing.T) {
				r := rigOf(t, raw, 4)
				for n := range 1000 {
					for i := range r.candidates { // every set of them but the empty one
						r.candidates[i].Available = (n%15+1)>>i&1 == 1
					}
					r.connect(request(fmt.Sprintf("/?room=%d", n)))
				}
			})
		}
	}
}

func TestNoneAvailable(t *testing.T) {
	for way, rigOf := range rigs {
		for name, raw := range every {
			t.Run(way+"/"+name, func(t *testing.T) {
				for n := range 3 {
					r := rigOf(t, raw, n)
					for i := range r.candidates {
						r.candidates[i].Available = false
					}
					if i, header := r.policy.Choose(r.candidates, request("/?room=1")); i != -1 || header != nil {
						t.Errorf("of %d: got upstream %d and header %v, want none", n, i, header)
					}
				}
			})
		}
	}
}
