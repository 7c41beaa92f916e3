package selection

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// layer4 are the policies that need no request: those that caddy-l4 has, too.
var layer4 = []string{"random", "random_choose", "least_conn", "round_robin", "weighted_round_robin", "first", "ip_hash"}

// CheckLayer4 refuses policies that choose by what a passthrough cannot see.
func CheckLayer4(raw json.RawMessage) error {
	if len(raw) == 0 {
		return nil
	}
	var named struct {
		Policy string `json:"policy"`
	}
	if err := json.Unmarshal(raw, &named); err != nil {
		return fmt.Errorf("reading lb_policy: %w", err)
	}
	if !slices.Contains(layer4, named.Policy) {
		return fmt.Errorf("lb_policy %q cannot be used here: want one of %s", named.Policy, strings.Join(layer4, ", "))
	}
	return nil
}
