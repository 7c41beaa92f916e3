// This file sets what policies see of an upstream. Caddy keeps it in unexported
// fields and exports nothing that sets them.

package selection

import (
	"reflect"
	"sync/atomic"
	"unsafe"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Where Caddy keeps an upstream's requests and whether it is unhealthy, or false
// if this version of Caddy keeps them elsewhere or as another type.
var (
	numRequestsOffset, numRequestsKnown = offsetOf[reverseproxy.Host, atomic.Int64]("numRequests")
	unhealthyOffset, unhealthyKnown     = offsetOf[reverseproxy.Upstream, atomic.Int32]("unhealthy")
)

// CanShowState reports whether policies of this version of Caddy can be shown
// connections and availability. If not, they are given the available upstreams
// only, so that weights are those of the first available ones; least_conn and
// random_choose still count, but not as the fallback of another policy, nor do
// policies that are not Caddy's.
func CanShowState() bool { return numRequestsKnown && unhealthyKnown }

// offsetOf returns where a Struct has the field of that name, and whether it has
// one itself, of that type. The offset of a promoted field would be in the
// embedded struct.
func offsetOf[Struct, Field any](name string) (uintptr, bool) {
	f, ok := reflect.TypeFor[Struct]().FieldByName(name)
	return f.Offset, ok && len(f.Index) == 1 && f.Type == reflect.TypeFor[Field]()
}

// state is what policies see of an upstream: its own fields.
type state struct {
	numRequests *atomic.Int64
	unhealthy   *atomic.Int32
}

// stateOf returns the state of u; nothing may be done with it unless CanShowState.
func stateOf(u *reverseproxy.Upstream) state {
	if !CanShowState() {
		return state{}
	}
	return state{
		numRequests: (*atomic.Int64)(unsafe.Add(unsafe.Pointer(u.Host), numRequestsOffset)),
		unhealthy:   (*atomic.Int32)(unsafe.Add(unsafe.Pointer(u), unhealthyOffset)),
	}
}

// set stores only what differs: a store costs many times a load, and most
// upstreams are as they were.
func (s state) set(conns int, available bool) {
	var unhealthy int32
	if !available {
		unhealthy = 1
	}
	if s.numRequests.Load() != int64(conns) {
		s.numRequests.Store(int64(conns))
	}
	if s.unhealthy.Load() != unhealthy {
		s.unhealthy.Store(unhealthy)
	}
}
