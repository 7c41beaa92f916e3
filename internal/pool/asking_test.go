// This file tests for whom a dynamic source is asked, and for how long.

package pool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// The source sees the client's request, with its context's values, and has the time
// that the pool allows.
func TestTheSourceIsAskedForTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80"})
		if own := s.request("/"); own == nil || own.Header == nil {
			t.Errorf("got request %v while no client asks, want one like a client's", own)
		}
		type key struct{}
		c := client()
		c.Request = c.Request.WithContext(context.WithValue(c.Request.Context(), key{}, "value"))
		s.hangs(false)
		elapsed(t, askTimeout, func() { r.want(r.pool.Tries(r.route, c, Opening, ""), "a:80") })
		if asked := s.request("/chat"); asked == nil || asked.Context().Value(key{}) != "value" {
			t.Errorf("got request %v, want the client's with the values of its context", asked)
		}
	})
}

// A client that goes away while the source thinks is nobody's error.
func TestTheClientGoesAwayWhileTheSourceIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.ErrorLevel)
		r, s := newDynamicRig(t, nil, func(_ *rig, c *Config) { c.Logger = zap.New(core) })
		if logs.Len() != 1 {
			t.Errorf("got logs %v, want one of a source that has no answer", logs.All())
		}
		s.hangs(false)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		elapsed(t, time.Second, func() {
			if target := r.open().Next(ctx); target != nil {
				t.Errorf("got %s, want nothing", target.Place.Key())
			}
		})
		r.want(r.open())
		pass(time.Minute)
		if logs.Len() != 1 {
			t.Errorf("got logs %v, want no more", logs.All())
		}
	})
}

// Stop does not wait for a question that is under way, and its answer is for nobody.
func TestStopWhileTheSourceIsAsked(t *testing.T) {
	for name, stubborn := range map[string]bool{"it gives up": false, "it answers anyway": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, s := newDynamicRig(t, []string{"a:80"}, checked(health.NewCheckers()))
				before := r.lefts()
				s.says("b:80")
				s.hangs(stubborn)
				pass(2 * time.Second)
				elapsed(t, 0, r.pool.Stop)
				pass(time.Hour)
				if r.pool.Has("b:80") || r.lefts() != before {
					t.Error("got the answer taken in after Stop")
				}
			})
		})
	}
}

// The same, at the last moment: the answer is there and is about to count.
func TestStopBeforeAnAnswerCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{names: []string{"not/good", "b:80"}}
		var r *rig
		began := make(chan struct{})
		r = newRig(t, nil, asks(s), checked(health.NewCheckers()), func(_ *rig, c *Config) {
			core, _ := observer.New(zap.WarnLevel)
			c.Logger = zap.New(core, zap.Hooks(func(zapcore.Entry) error { // about the bad address
				<-began
				r.pool.Stop()
				return nil
			}))
		})
		close(began)
		pass(time.Hour)
		if n := len(r.net.dialed()); n != 0 || len(r.pool.Upstreams()) != 0 {
			t.Errorf("got %d probes and upstreams %v after Stop, want none", n, r.pool.Upstreams())
		}
	})
}

// While a pool looks after an upstream its state is kept, and not longer.
func TestDynamicUpstreamsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, s := newDynamicRig(t, []string{"a:80", "b:80"}, fails(1, time.Hour))
		r.fail("a:80", 1)
		r.want(r.open(), "b:80")
		s.says("b:80")
		pass(time.Second)
		s.says("a:80", "b:80")
		pass(time.Second)
		r.want(r.open(), "a:80", "b:80")
		r.fail("b:80", 1)
		r.pool.Stop()
		r.route.Loads(func(load func(string) registry.Load) {
			if l := load("b:80"); l.Fails != 0 {
				t.Errorf("got %d failures kept after Stop, want none", l.Fails)
			}
		})
	})
}
