package registry

import "errors"

// What callers must tell apart. The texts are for operators and hold no secret.
var (
	ErrTokenUnknown   = errors.New("this coordinator did not make that join token, or it was made before a restore: create a new one")
	ErrTokenUsed      = errors.New("the join token was used already: create a new one")
	ErrTokenExpired   = errors.New("the join token has expired: create a new one")
	ErrTokenRevoked   = errors.New("the join token was revoked")
	ErrTokenOtherName = errors.New("the join token was made for another node name")
	ErrTokenRequest   = errors.New("the join token cannot be made as asked")

	ErrNameTaken   = errors.New("a node of that name exists: choose another name, or create the token with --replace")
	ErrKeyTaken    = errors.New("that key belongs to another node")
	ErrKeyRetired  = errors.New("that key was replaced and is no longer accepted: enrol again with a new key and token")
	ErrNodeRevoked = errors.New("the node was revoked: its key is refused for good")
	ErrNodeUnknown = errors.New("there is no node of that name")

	ErrWorkloadUnknown = errors.New("the policy declares no such workload")
	ErrNotPlaced       = errors.New("the workload is not placed on that node")

	ErrPolicyConflict = errors.New("the policy was changed by someone else meanwhile: get it again and apply on top of that")
	ErrPolicyUnknown  = errors.New("there is no such policy revision")
	ErrPolicyTooLarge = errors.New("the policy is too large")

	ErrPoolExhausted = errors.New("the overlay's IPv4 range has no free address")
	ErrSettings      = errors.New("the settings do not fit what is stored")
)
