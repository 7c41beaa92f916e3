// This file tests pools whose upstreams a dynamic source names.

package pool

import (
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

var errNoAnswer = errors.New("no such host")

// newDynamicRig has a pool with upstreams of a source that has answered once.
func newDynamicRig(t *testing.T, names []string, options ...option) (*rig, *source) {
	t.Helper()
	s := &source{names: names}
	r := newRig(t, nil, append(options, asks(s))...)
	synctest.Wait()
	return r, s
}

func TestNewConnectionsFollowTheSourceAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80", "b:80"})
		r.want(r.open(), "a:80", "b:80")
		s.says("c:80", "a:80")
		elapsed(t, 0, func() {
			r.want(r.open(), "c:80", "a:80") // in the order of the answer
			r.want(r.resume("a:80"), "c:80", "a:80")
			r.want(r.move("c:80"), "a:80")
		})
		pass(time.Second)
		r.want(r.open(), "c:80", "a:80")
	})
}

func TestVanishedUpstreamsAreLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80", "b:80"})
		if !r.pool.Has("a:80") || !r.pool.Has("b:80") || r.pool.Has("c:80") {
			t.Error("got other upstreams than those of the first answer")
		}
		before := r.lefts()
		s.says("b:80", "c:80")
		pass(time.Second)
		if r.pool.Has("a:80") || !r.pool.Has("b:80") || !r.pool.Has("c:80") {
			t.Error("got other upstreams than those of the second answer")
		}
		if got := r.lefts() - before; got != 1 {
			t.Errorf("got %d calls of Left, want 1", got)
		}
		s.says("b:80", "c:80", "d:80")
		pass(time.Second)
		if got := r.lefts() - before; got != 1 || !r.pool.Has("d:80") {
			t.Errorf("got %d calls of Left after an upstream came, want still 1", got)
		}
	})
}

// Before the first answer nobody knows which upstreams stay. With it, connections
// that a config before had at others are to leave.
func TestTheFirstAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{names: []string{"a:80"}, err: errNoAnswer}
		r := newRig(t, nil, asks(s))
		pass(10 * time.Second)
		if !r.pool.Has("old:80") || r.lefts() != 0 {
			t.Errorf("got Has %t and %d calls of Left without an answer, want true and none", r.pool.Has("old:80"), r.lefts())
		}
		s.says("a:80")
		pass(time.Second)
		if r.pool.Has("old:80") || r.lefts() != 1 {
			t.Errorf("got Has %t and %d calls of Left after the first answer, want false and 1", r.pool.Has("old:80"), r.lefts())
		}
	})
}

func TestTheSameAnswerChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80", "b:80"}, checked(health.NewCheckers()))
		before, dials, answer := r.lefts(), len(r.net.dialed()), r.pool.answer.Load()
		s.says("b:80", "a:80", "b:80")
		pass(5 * time.Second)
		if r.lefts() != before || r.pool.answer.Load() != answer {
			t.Error("got a change by the same answer in another order")
		}
		if n := len(r.net.dialed()); dials != 2 || n != 0 {
			t.Errorf("got %d probes and %d more, want 2 and none: the checks go on", dials, n)
		}
		r.want(r.open(), "b:80", "a:80")
	})
}

// A source that is out of order takes nothing away.
func TestASourceThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80", "b:80"})
		before := r.lefts()
		s.breaks(errNoAnswer)
		pass(10 * time.Second)
		r.want(r.open(), "a:80", "b:80")
		if !r.pool.Has("a:80") || r.lefts() != before {
			t.Error("got upstreams left because the source failed")
		}
	})
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, asks(&source{err: errNoAnswer}), waits(time.Second), retries(0))
		elapsed(t, time.Second, func() { r.want(r.open()) })
	})
}

func TestConfiguredUpstreamsAreForASourceThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{names: []string{"a:80"}}
		r := newRig(t, []string{"x:80"}, asks(s))
		synctest.Wait()
		r.want(r.open(), "a:80")
		s.breaks(errNoAnswer)
		r.want(r.open(), "x:80")
		s.says("a:80")
		r.want(r.open(), "a:80")
	})
}

// While a client waits, the source may come back.
func TestWaitingClientsAskAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, nil, waits(10*time.Second), retries(0))
		time.AfterFunc(2100*time.Millisecond, func() { s.says("a:80") })
		elapsed(t, 2250*time.Millisecond, func() { r.want(r.open(), "a:80") })
	})
}

// An answer without upstreams is like none.
func TestAnEmptyAnswer(t *testing.T) {
	for name, answer := range map[string][]string{"nothing": nil, "nothing of use": {"", ""}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, s := newDynamicRig(t, []string{"a:80", "b:80"})
				before := r.lefts()
				s.says(answer...)
				r.want(r.open(), "a:80", "b:80")
				pass(10 * time.Second)
				r.want(r.open(), "a:80", "b:80")
				if !r.pool.Has("a:80") || r.lefts() != before {
					t.Error("got upstreams left because the answer was empty")
				}
			})
			synctest.Test(t, func(t *testing.T) {
				s := &source{names: answer}
				r := newRig(t, []string{"x:80"}, asks(s))
				r.want(r.open(), "x:80")
			})
		})
	}
}

// A source may have upstreams for some clients only, of which its answer to nobody
// knows nothing. Who was given one stays there.
func TestUpstreamsForSomeClientsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil, func(_ *rig, c *Config) {
			c.Dynamic = some{&source{names: []string{"a:80"}}, "/chat", []string{"mine:80", "{tenant}:81"}}
		})
		synctest.Wait()
		tries := r.openAs("one", nil)
		mine, tenant := tries.Next(t.Context()).Place, tries.Next(t.Context()).Place
		pass(time.Minute)
		for _, place := range []*registry.Upstream{mine, tenant} {
			if !r.pool.Has(place.Key()) {
				t.Errorf("%s: got it taken for one that is gone", place.Key())
			}
			r.route.Leave(place)
		}
		pass(time.Second)
		if r.pool.Has(mine.Key()) || r.pool.Has(tenant.Key()) {
			t.Error("got upstreams remembered without connections")
		}
	})
}

// A new upstream is one of the pool's from the first connection on; when it is named
// in an answer to nobody, it can vanish from there.
func TestNewUpstreamsMayVanish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80"})
		s.says("b:80", "a:80")
		place := r.connect()
		if place.Key() != "b:80" || !r.pool.Has("b:80") {
			t.Errorf("got %s, and Has %t, want b:80 at once", place.Key(), r.pool.Has("b:80"))
		}
		pass(time.Second)
		before := r.lefts()
		s.says("a:80")
		pass(time.Second)
		if r.pool.Has("b:80") || r.lefts() != before+1 {
			t.Errorf("got Has %t and %d calls of Left, want false and 1", r.pool.Has("b:80"), r.lefts()-before)
		}
	})
}

// some is a source that has another answer for requests of one path.
type some struct {
	*source
	path  string
	names []string
}

// GetUpstreams implements reverseproxy.UpstreamSource.
func (s some) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	if r.URL.Path != s.path {
		return s.source.GetUpstreams(r)
	}
	ups := make([]*reverseproxy.Upstream, 0, len(s.names))
	for _, name := range s.names {
		ups = append(ups, &reverseproxy.Upstream{Dial: name})
	}
	return ups, nil
}

// What a source says wrong stands in the way of nothing else.
func TestWrongAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		r, _ := newDynamicRig(t, []string{"a:80/path", "b:80", "b:80", "", "c:80"}, func(_ *rig, c *Config) { c.Logger = zap.New(core) })
		if logs.FilterMessage("a dynamic upstream is left out").Len() != 1 {
			t.Errorf("got logs %v, want one about the bad address", logs.All())
		}
		tries := r.open()
		r.want(tries, "b:80", "c:80")
		if n := len(r.pool.Upstreams()); n != 2 {
			t.Errorf("got %d upstreams shown, want 2", n)
		}
	})
}

// An upstream may be configured for a source that fails, and be named by it.
func TestConfiguredAndNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{names: []string{"a:80", "b:80"}}
		r := newRig(t, []string{"a:80"}, asks(s), checked(health.NewCheckers()))
		synctest.Wait()
		var keys []string
		for _, u := range r.pool.Upstreams() {
			keys = append(keys, u.Key)
		}
		if len(keys) != 2 || keys[0] != "a:80" || keys[1] != "b:80" {
			t.Errorf("got upstreams %q, want each once", keys)
		}
		r.net.set("a:80", true)
		pass(time.Minute)
		if got := r.changed(); len(got) != 1 {
			t.Errorf("got changes %q, want one", got)
		}
		r.want(r.open(), "b:80")
		s.says("b:80")
		pass(time.Second)
		if !r.pool.Has("a:80") {
			t.Error("got a configured upstream taken for one that is gone")
		}
		s.breaks(errNoAnswer)
		r.net.set("a:80", false)
		pass(time.Minute)
		r.want(r.open(), "a:80")
	})
}

func TestDynamicUpstreamsAreChecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80", "b:80"}, checked(health.NewCheckers()), leaves)
		r.net.set("a:80", true)
		pass(time.Minute)
		r.want(r.open(), "b:80")
		if !r.pool.Leaves(r.route, "a:80") {
			t.Error("got an unhealthy upstream not left")
		}
		s.says("b:80")
		pass(time.Second)
		r.net.dialed()
		pass(time.Minute)
		for _, d := range r.net.dialed() {
			if d.to.Dial() == "a:80" {
				t.Error("got a probe of an upstream that is gone")
			}
		}
		s.says("a:80", "b:80") // it is a new one, of which nothing is known
		r.want(r.open(), "a:80", "b:80")
	})
}

// The source is asked again and again, but a failure is told of once.
func TestFailuresOfDynamicUpstreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newDynamicRig(t, []string{"a:80", "b:80"}, fails(1, time.Hour), leaves)
		before := r.lefts()
		r.fail("a:80", 1)
		pass(10 * time.Second)
		if got := r.lefts() - before; got != 1 || !r.pool.Leaves(r.route, "a:80") {
			t.Errorf("got %d calls of Left and Leaves %t, want 1 and true", got, r.pool.Leaves(r.route, "a:80"))
		}
	})
}

// Placeholders in an answer stand for what the client says, like configured ones.
func TestPlaceholdersInAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"{tenant}:80"})
		r.want(r.openAs("one", nil), "{tenant}:80 one:80")
		if !r.pool.Has("{tenant}:80 one:80") {
			t.Error("got the address taken for one that is gone")
		}
		s.says("b:80")
		pass(time.Second)
		if r.pool.Has("{tenant}:80 one:80") {
			t.Error("got the address kept that the source names no more")
		}
	})
}
