// This file tests what becomes of an opening whose end is planned.

package opening

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// A planned end comes in time, whatever is being dialed, unless the plan is lifted.
func TestPlannedEnd(t *testing.T) {
	orphan := registry.Ending{Reason: registry.Orphan}
	for name, tt := range map[string]struct {
		plan func(reg *registry.Registry, route *registry.Route, o *Opening)
		ends bool
	}{
		"planned": {func(reg *registry.Registry, route *registry.Route, _ *Opening) {
			reg.EndPaced(route, time.Minute, orphan)
		}, true},
		"planned sooner": {func(reg *registry.Registry, route *registry.Route, _ *Opening) {
			reg.EndPaced(route, time.Hour, orphan)
			reg.EndPaced(route, time.Minute, orphan)
		}, true},
		"put off": {func(_ *registry.Registry, _ *registry.Route, o *Opening) {
			o.rec.CloseAt(time.Now().Add(time.Second), orphan)
			o.rec.CloseAt(time.Now().Add(time.Hour), orphan)
		}, false},
		"lifted": {func(reg *registry.Registry, route *registry.Route, _ *Opening) {
			reg.EndPaced(route, time.Minute, orphan)
			reg.KeepAll(route, func(string) bool { return true })
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reg := registry.New()
				route := reg.Retain(registry.Passthrough, "route")
				o := New(t.Context())
				if err := o.Admit(reg, route, registry.Info{Kind: registry.Passthrough}); err != nil {
					t.Fatal(err)
				}
				defer o.Close()
				tt.plan(reg, route, o)
				time.Sleep(time.Minute - time.Second)
				synctest.Wait()
				if o.ctx.Err() != nil {
					t.Fatal("got it ended before its time")
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if ended := o.ctx.Err() != nil; ended != tt.ends {
					t.Errorf("ended: got %t, want %t", ended, tt.ends)
				}
				if got := o.rec.Ending(); tt.ends && got != orphan {
					t.Errorf("got ending %+v, want %+v", got, orphan)
				}
			})
		})
	}
}

// A plan, or a wish to move, that comes before the opening knows its record is not lost,
// and does no harm.
func TestPlannedBeforeAdmitReturns(t *testing.T) {
	o := New(t.Context())
	o.Reconsider()
	if err := o.Move(); err == nil || errors.Is(err, ErrEnded) {
		t.Errorf("move: got %v, want a refusal", err)
	}
}
